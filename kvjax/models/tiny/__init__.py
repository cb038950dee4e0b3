"""The built-in model `tiny`: a Hugging Face folder as package data; see README.md here."""
