"""One file per backend: load, launch, kernel."""
