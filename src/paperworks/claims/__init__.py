"""How the claim of each method is measured: one file a method, in the folder of its family."""
