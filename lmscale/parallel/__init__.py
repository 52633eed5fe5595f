"""How a model is laid out over a named mesh (pipe, data, tensor), and the step that runs on it."""
