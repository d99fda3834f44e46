"""A run from recipe to report: its stages, their hashes, the run folder, the HTML report and the model card.

The one idea: a stage is redone only when the hash of what it depends on changes, so a run can stop and go on anywhere.
What a stage does lives in the rooms below; here they are put in order and their results on paper.
"""
