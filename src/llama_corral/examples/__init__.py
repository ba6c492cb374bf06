"""Workflows to read, to copy and to run: they need no network, no key and no model.

hello      one step: the smallest workflow
counter    state that a session keeps between its runs
form       asks a person, checks the answers, asks again
digest     a real job: reads files side by side, reports progress, asks for approval
workloads  synthetic load for benchmarks
"""
