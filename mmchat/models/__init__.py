"""The networks and what they read: prompts, images, speech. vision_language_model.py joins them."""
