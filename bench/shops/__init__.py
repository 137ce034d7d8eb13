"""Small, slow and new shops, made from the H&M data and Amazon reviews, trained with defaults."""
