"""What people look at of a report: a table, pages and pictures, each made of its numbers."""
