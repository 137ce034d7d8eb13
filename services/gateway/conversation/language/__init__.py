"""What messages of a conversation mean, and the words of its replies."""
