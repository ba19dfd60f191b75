"""Tickets: several sparse networks found along one run, averaged or used together."""
