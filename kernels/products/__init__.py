"""The products of the ops by whichever kernel is best here."""
