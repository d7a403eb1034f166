"""What a public model name stands for."""
