"""The web page: browse the methods, check them, compare and combine runs, use the tools."""
