"""Images, boxes and class texts: the generated data, the formats that are read, augmentation, text features.

Everything above may import this folder; it imports neither ``training`` nor ``commands``.
"""
