"""What others see of an artifact: its model card, its licence, its upload to the hub."""
