"""Models of other libraries as folders of runs, and back. Reads data files only; nothing from a folder is run."""
