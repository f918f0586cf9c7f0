"""Models side by side on a page, and people who vote on blind pairs."""
