"""Models of other libraries as lmscale configs and parameters. Reads data files only; nothing from a folder is run."""
