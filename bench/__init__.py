"""Both engines side by side: python -m bench speed|quality.

Every figure goes into one record (report.py), and Markdown and JSON are written from it.
"""
