"""Both engines side by side: python -m bench parity|speed|memory|quality.

Every figure goes into one record (report.py), and Markdown and JSON are written from it.
"""
