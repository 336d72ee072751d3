"""The networks, one file each: image encoder, projector, language model, speech, and the model that joins them."""
