"""The Jacobians of a chain's stages: materialised where they are small; larger ones have their place here."""
