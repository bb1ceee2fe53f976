"""How kdkernels meets other libraries' models and trainers."""
