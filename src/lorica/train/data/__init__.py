"""The rows of a run: where they come from, which can be used, what their columns and labels say.

splits                            training, validation and test rows of a configuration: read here first
sources                           a file, a folder, the Hub; which reader takes a file
text, spreadsheets, json, tables  the readers, and what they return
mapped, running                   rows that stay on disk; texts that go on over rows
forms/                            texts, conversations, preferences: known by their columns, read as one form
rows, columns, labels             rows that are refused; columns that are looked for; classes
"""
