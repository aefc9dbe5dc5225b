"""What is known about layer classes and timm models."""
