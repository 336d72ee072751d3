"""The story, one file per part: prompt, image encoder, projector, language model, and all of them as one."""
