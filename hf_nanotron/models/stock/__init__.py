"""What is known of stock models."""
