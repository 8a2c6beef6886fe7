"""Reports: tables, plots, TensorBoard, the page of a run, the console. Plain data in, text and figures out."""
