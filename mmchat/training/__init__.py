"""Makes a projector and an adapter: data, trainer, metrics. It uses the very modules that chat uses."""
