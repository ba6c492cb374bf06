PRAGMA application_id = 1280066386;
CREATE TABLE corral_checkpoints (
	task_no INTEGER NOT NULL, 
	epoch BIGINT NOT NULL, 
	inbox_applied BIGINT NOT NULL, 
	snapshot TEXT NOT NULL, 
	fingerprint TEXT, 
	PRIMARY KEY (task_no)
);
CREATE TABLE corral_contexts (
	session_id TEXT NOT NULL, 
	service_name TEXT NOT NULL, 
	version BIGINT NOT NULL, 
	payload TEXT NOT NULL, 
	fingerprint TEXT, 
	PRIMARY KEY (session_id, service_name)
);
CREATE TABLE corral_instances (
	instance_id TEXT NOT NULL, 
	service_name TEXT NOT NULL, 
	capacity BIGINT DEFAULT '0' NOT NULL, 
	heartbeat BIGINT DEFAULT '0' NOT NULL, 
	started_at DOUBLE NOT NULL, 
	PRIMARY KEY (instance_id)
);
CREATE INDEX corral_instances_service ON corral_instances (service_name);
CREATE TABLE corral_meta (
	"key" TEXT NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY ("key")
);
CREATE TABLE corral_services (
	service_name TEXT NOT NULL, 
	definition TEXT NOT NULL, 
	events TEXT, 
	start_schema TEXT, 
	registered_at DOUBLE NOT NULL, 
	PRIMARY KEY (service_name)
);
CREATE TABLE corral_sessions (
	session_id TEXT NOT NULL, 
	state TEXT NOT NULL, 
	version BIGINT DEFAULT '0' NOT NULL, 
	policy TEXT NOT NULL, 
	created_at DOUBLE NOT NULL, 
	PRIMARY KEY (session_id)
);
CREATE TABLE corral_task_events (
	task_no BIGINT NOT NULL, 
	idx BIGINT NOT NULL, 
	epoch BIGINT NOT NULL, 
	type TEXT NOT NULL, 
	payload TEXT NOT NULL, 
	PRIMARY KEY (task_no, idx)
)
 WITHOUT ROWID;
CREATE TABLE corral_task_inbox (
	task_no BIGINT NOT NULL, 
	seq BIGINT NOT NULL, 
	payload TEXT NOT NULL, 
	sent_at DOUBLE NOT NULL, 
	PRIMARY KEY (task_no, seq)
)
 WITHOUT ROWID;
CREATE TABLE corral_tasks (
	no INTEGER NOT NULL, 
	task_id TEXT NOT NULL, 
	session_id TEXT NOT NULL, 
	implicit_session BIGINT DEFAULT '0' NOT NULL, 
	service_name TEXT NOT NULL, 
	status TEXT NOT NULL, 
	epoch BIGINT DEFAULT '0' NOT NULL, 
	attempts BIGINT DEFAULT '0' NOT NULL, 
	max_attempts BIGINT NOT NULL, 
	owner TEXT, 
	nonce TEXT, 
	report_seq BIGINT DEFAULT '0' NOT NULL, 
	event_count BIGINT DEFAULT '0' NOT NULL, 
	inbox_head BIGINT DEFAULT '0' NOT NULL, 
	has_checkpoint BIGINT DEFAULT '0' NOT NULL, 
	cancel_requested BIGINT DEFAULT '0' NOT NULL, 
	digest TEXT, 
	created_at DOUBLE NOT NULL, 
	started_at DOUBLE, 
	finished_at DOUBLE, 
	deadline DOUBLE, 
	not_before DOUBLE, 
	context_saved BIGINT, 
	context_error TEXT, 
	input TEXT NOT NULL, 
	result TEXT, 
	result_text TEXT DEFAULT '' NOT NULL, 
	error TEXT, 
	PRIMARY KEY (no)
);
CREATE INDEX corral_tasks_deadline ON corral_tasks (status, deadline) WHERE deadline IS NOT NULL;
CREATE UNIQUE INDEX corral_tasks_id ON corral_tasks (task_id);
CREATE INDEX corral_tasks_line ON corral_tasks (session_id, service_name, status, no) WHERE implicit_session = 0;
CREATE INDEX corral_tasks_owner ON corral_tasks (owner) WHERE owner IS NOT NULL AND status IN ('held', 'queued', 'running', 'waiting');
CREATE INDEX corral_tasks_session ON corral_tasks (session_id, no) WHERE implicit_session = 0;
CREATE INDEX corral_tasks_status ON corral_tasks (status, no);
CREATE INDEX corral_tasks_status_service ON corral_tasks (status, service_name, no);
INSERT INTO corral_meta (key, value) VALUES ('schema_version', '1');
