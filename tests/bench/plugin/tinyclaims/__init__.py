"""Methods whose claims are measured in no time, for the tests of the bench."""
