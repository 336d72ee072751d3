"""Training data: conversations from captions, labels and questions; features; packing into batches."""
