"""`kdkernels demo`: a small language model distilled on real text, and what the loss costs while it happens.

`config` holds the numbers, `run` the order of events, `report` the verdict, and `parts` is why an interrupted
run goes on.
"""
