"""Text encoders and other encoders of conditionings."""
