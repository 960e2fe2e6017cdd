"""The Hub's weights: layout, reading, writing."""
