"""What a service must not forget, in one folder: runs, calls, checkpoints, and whose they are.

registry   one SQLite file: sessions, runs, samplers, checkpoints, and every call that was accepted
tenants    keys, what each may use, and how much of it is used
service    the verbs, durable: a call is written down before it is answered
replay     a run brought back: its last snapshot, then its calls since, in order
calls      what each sort of call does
"""
