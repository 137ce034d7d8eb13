"""Fine-tunes and quantizes the encoders."""
