"""What a language model is: layers, the layer pattern, the model. Knows no mesh and no devices."""
