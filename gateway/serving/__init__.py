"""What happens to one request once it is let in."""
