"""The model, part by part, and its Hugging Face form."""
