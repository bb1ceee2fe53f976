"""`kdkernels demo`: a small language model distilled on real text, and what the loss costs while it happens.

`config` holds the numbers, `run` the order of events, `report` the verdict; `parts` is what makes an interrupted run go on.
"""
