"""Packed layers in the model's own modules."""
