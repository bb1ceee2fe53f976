"""`kdkernels distill`: options, data, plan, memory, a run that goes on where it was, and its report."""
