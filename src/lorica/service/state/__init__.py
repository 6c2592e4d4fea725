"""The durable part of a service, in one folder: runs, calls, checkpoints, and their tenants.

registry   one SQLite file: sessions, runs, samplers, checkpoints, and every call that was accepted
tenants    keys, quotas, and their use
service    the verbs, durable: a call is written down before it is answered
replay     a run brought back: its last snapshot, then its calls since, in order
calls      the work of each sort of call
"""
