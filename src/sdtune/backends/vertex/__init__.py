"""Custom jobs of Vertex AI, on Google Cloud."""
