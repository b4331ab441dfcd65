"""How to measure backward locking; no claim is named here."""
