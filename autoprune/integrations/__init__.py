"""`PruningHooks` as a callback of trainers that own the loop. One file and one extra a trainer."""
