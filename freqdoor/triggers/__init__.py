"""Triggers T: functions from a clean image to a poisoned one that looks the same."""
