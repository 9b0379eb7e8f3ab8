/* SPDX-License-Identifier: MIT */
/*
 * The journal: a file that the tree, the domains and the quotas can be made from again.
 *
 *   header   8 bytes "PVXSJRNL", u32 version, u32 CRC-32C of these 12 bytes
 *   frame    u32 n, u32 CRC-32C of n, u32 CRC-32C of the records, n bytes of records; one frame is one change, whole or
 *            not at all
 *   record   u8 kind, then
 *     NODE        u16 n_path, u16 n_perms, u32 n_value, path, n_perms x (u16 domid, u16 access), value
 *     MADE        u16 levels, then as NODE: a new node and so many levels above it, with the same permissions and no value
 *     REMOVED     u16 n_path, path: with all below it
 *     SPECIAL     u8 which, u16 n_perms, permissions
 *     DOMAIN      u32 domid, u8 known, introduced, shut_down, has_target, u32 features, target, gfn, port, 10 x u32 quota
 *     QUOTA       u32 quota, u32 value: that new domains get
 *     GENERATION  u64
 *     COMPLETE    the snapshot ends here
 *
 * All numbers are little-endian. A file starts with everything there is (a snapshot), parents before their children and
 * children in their order, and goes on with changes. It is put in its place when its snapshot is complete, so only what
 * comes after that, and of it only the last frame, can be torn.
 *
 * A new snapshot is written a few nodes at a time, while the tree changes: a change of a node that the new file has
 * already goes to it too; one of a node that it has not is found when its turn comes.
 */
#include <errno.h>
#include <unistd.h>

#include "xs_journal.h"

#define NODES_PER_FRAME 64
#define LONG_BYTES (8 << 20)   /* a shorter journal is not worth a snapshot */
#define GENERATIONS_APART (1ull << 32)

/* -- CRC-32C, eight bytes at a time */

static uint32_t crc_table[8][256];

void xs_crc_init(void)
{
	if (crc_table[0][1])
		return;
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
		crc_table[0][i] = crc;
	}
	for (int slice = 1; slice < 8; slice++) {
		for (uint32_t i = 0; i < 256; i++)
			crc_table[slice][i] = crc_table[0][crc_table[slice - 1][i] & 255] ^ crc_table[slice - 1][i] >> 8;
	}
}

uint32_t xs_crc(uint32_t crc, const uint8_t *data, uint64_t n)
{
	crc = ~crc;
	for (; n >= 8; n -= 8, data += 8) {
		uint32_t low, high;

		memcpy(&low, data, 4);
		memcpy(&high, data + 4, 4);
		low ^= crc;
		crc = crc_table[7][low & 255] ^ crc_table[6][low >> 8 & 255] ^ crc_table[5][low >> 16 & 255] ^
		      crc_table[4][low >> 24] ^ crc_table[3][high & 255] ^ crc_table[2][high >> 8 & 255] ^
		      crc_table[1][high >> 16 & 255] ^ crc_table[0][high >> 24];
	}
	while (n--)
		crc = crc >> 8 ^ crc_table[0][(crc ^ *data++) & 255];
	return ~crc;
}

static struct frame_header header_of(uint32_t n, const uint8_t *records)
{
	return (struct frame_header){ n, xs_crc(0, (const uint8_t *)&n, sizeof n), xs_crc(0, records, n) };
}

/* -- writing records */

/* Room for a record in the open frame, which is opened if there is none. */
static uint8_t *record(struct xs_log *log, uint64_t n)
{
	if (!log->open) {
		log->open = 1;
		log->frame = log->pending.n;
		xs_bytes_add(&log->pending, FRAME_HEADER_BYTES);
	}
	return xs_bytes_add(&log->pending, n);
}

static void close_frame(struct xs_log *log)
{
	struct frame_header header;
	uint8_t *frame;

	if (!log->open)
		return;
	log->open = 0;
	frame = log->pending.data + log->frame;
	header = header_of((uint32_t)(log->pending.n - log->frame - FRAME_HEADER_BYTES), frame + FRAME_HEADER_BYTES);
	memcpy(frame, &header, sizeof header);
	log->bytes += sizeof header + header.n;
}

static uint8_t *put(uint8_t *at, const void *data, uint64_t n)
{
	if (n)
		memcpy(at, data, n);
	return at + n;
}

static void record_node(struct xs_log *log, const char *path, uint32_t n, const struct xs_content *content, uint32_t n_above)
{
	uint16_t lengths[2] = { (uint16_t)n, (uint16_t)content->perms->n }, levels = (uint16_t)n_above;
	uint64_t perms_bytes = content->perms->n * sizeof *content->perms->entries;
	uint8_t *at = record(log, (levels ? 11 : 9) + n + perms_bytes + content->n_value);

	*at++ = levels ? MADE : NODE;
	if (levels)
		at = put(at, &levels, sizeof levels);
	at = put(at, lengths, sizeof lengths);
	at = put(at, &content->n_value, 4);
	at = put(at, path, n);
	at = put(at, content->perms->entries, perms_bytes);
	put(at, content->value, content->n_value);
}

static void record_special(struct xs_log *log, const struct pv_xs *hub, int name)
{
	const struct xs_perms *perms = hub->special[name];
	uint16_t n = (uint16_t)perms->n;
	uint8_t *at = record(log, 4 + n * sizeof *perms->entries);

	*at++ = SPECIAL;
	*at++ = (uint8_t)name;
	at = put(at, &n, 2);
	put(at, perms->entries, n * sizeof *perms->entries);
}

static void record_domain(struct xs_log *log, const struct pv_xs_domain *domain)
{
	uint8_t flags[4] = { (uint8_t)domain->known, (uint8_t)domain->introduced, (uint8_t)domain->shut_down,
			     (uint8_t)domain->has_target };
	uint32_t words[4] = { domain->features, domain->target, domain->gfn, domain->port };
	uint8_t *at = record(log, 25 + sizeof domain->quotas);

	*at++ = DOMAIN;
	at = put(at, &domain->domid, 4);
	at = put(at, flags, sizeof flags);
	at = put(at, words, sizeof words);
	put(at, domain->quotas, sizeof domain->quotas);
}

static void record_quota(struct xs_log *log, uint32_t quota, uint32_t value)
{
	uint32_t words[2] = { quota, value };
	uint8_t *at = record(log, 9);

	*at++ = QUOTA;
	put(at, words, sizeof words);
}

static void record_generation(struct xs_log *log, uint64_t generation)
{
	uint8_t *at = record(log, 9);

	*at++ = GENERATION;
	put(at, &generation, 8);
}

/* -- changes go to the journal, and to the new file as far as it has what they change */

static int in_snapshot(const struct pv_xs *hub, const struct xs_node *node)
{
	const struct xs_journal *journal = &hub->journal;

	return journal->snapshot.fd >= 0 && (journal->done || node->epoch == journal->epoch);
}

void xs_log_node(struct pv_xs *hub, const char *path, uint32_t n, const struct xs_node *node, uint32_t n_above)
{
	if (hub->journal.log.fd >= 0)
		record_node(&hub->journal.log, path, n, node->content, n_above);
	if (in_snapshot(hub, node))
		record_node(&hub->journal.snapshot, path, n, node->content, n_above);
}

static void record_removed(struct xs_log *log, const char *path, uint32_t n)
{
	uint16_t length = (uint16_t)n;
	uint8_t *at = record(log, 3 + n);

	*at++ = REMOVED;
	at = put(at, &length, 2);
	put(at, path, n);
}

/* What the new file does not have yet has nothing below it there either: children are younger. */
void xs_log_removed(struct pv_xs *hub, const char *path, uint32_t n, const struct xs_node *node)
{
	if (hub->journal.log.fd >= 0)
		record_removed(&hub->journal.log, path, n);
	if (in_snapshot(hub, node))
		record_removed(&hub->journal.snapshot, path, n);
}

void xs_log_special(struct pv_xs *hub, int name)
{
	if (hub->journal.log.fd >= 0)
		record_special(&hub->journal.log, hub, name);
	if (hub->journal.snapshot.fd >= 0)
		record_special(&hub->journal.snapshot, hub, name);
}

void xs_log_domain(struct pv_xs *hub, const struct xs_domain *domain)
{
	if (hub->journal.log.fd >= 0)
		record_domain(&hub->journal.log, &domain->public);
	if (hub->journal.snapshot.fd >= 0)
		record_domain(&hub->journal.snapshot, &domain->public);
}

void xs_log_quota(struct pv_xs *hub, uint32_t quota, uint32_t value)
{
	if (hub->journal.log.fd >= 0)
		record_quota(&hub->journal.log, quota, value);
	if (hub->journal.snapshot.fd >= 0)
		record_quota(&hub->journal.snapshot, quota, value);
}

void xs_log_commit(struct pv_xs *hub)
{
	hub->journal.frames += hub->journal.log.open;
	close_frame(&hub->journal.log);
	close_frame(&hub->journal.snapshot);
}

void xs_snapshot_skip(struct pv_xs *hub, const struct xs_node *node)
{
	if (hub->journal.next == node)
		hub->journal.next = node->newer;
}

void xs_snapshot_meet(struct pv_xs *hub, struct xs_node *node)
{
	struct xs_journal *journal = &hub->journal;

	if (journal->snapshot.fd >= 0 && !journal->done && !journal->next)
		journal->next = node; /* what was the last to be written is gone */
}

/* -- files */

static int write_out(struct xs_log *log, int sync)
{
	uint64_t done = 0;
	int error = 0;

	if (log->lost)
		return -log->lost;
	while (done < log->pending.n) {
		ssize_t n = write(log->fd, log->pending.data + done, log->pending.n - done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			error = n ? -errno : -EIO;
			break;
		}
		done += (uint64_t)n;
	}
	if (done) {
		log->pending.n -= done;
		memmove(log->pending.data, log->pending.data + done, log->pending.n);
		log->unsynced = 1;
	}
	if (!error && sync && log->unsynced) {
		if (fdatasync(log->fd)) {
			log->lost = errno; /* a later one may succeed without what this one should have written */
			return -log->lost;
		}
		log->unsynced = 0;
	}
	return error;
}

int pv_xs_journal_flush(struct pv_xs *hub)
{
	struct xs_journal *journal = &hub->journal;
	int error = 0;

	if (journal->log.fd >= 0)
		error = write_out(&journal->log, journal->sync);
	journal->error = error;
	if (!error && journal->snapshot.fd >= 0 && journal->done)
		error = write_out(&journal->snapshot, journal->sync);
	return error;
}

void pv_xs_journal_to(struct pv_xs *hub, int fd, uint64_t n_bytes, int sync)
{
	struct xs_journal *journal = &hub->journal;

	journal->log.fd = fd;
	journal->log.bytes = journal->base_bytes = n_bytes;
	journal->log.pending.n = 0;
	journal->log.open = journal->log.unsynced = 0;
	journal->log.lost = 0;
	journal->sync = sync;
	hub->loop.full_told = 0;
	if (fd >= 0) {
		/* A generation that clients of the former daemon have seen does not come again. */
		hub->generation += GENERATIONS_APART;
		record_generation(&journal->log, hub->generation);
		close_frame(&journal->log);
	}
}

void pv_xs_journal_sync(struct pv_xs *hub, int sync)
{
	hub->journal.sync = sync;
}

static void start_file(struct xs_log *log)
{
	uint32_t version = VERSION, crc;
	uint8_t *start = xs_bytes_add(&log->pending, FILE_HEADER_BYTES);
	uint8_t *at = put(put(start, magic, sizeof magic), &version, sizeof version);

	crc = xs_crc(0, start, FILE_HEADER_BYTES - sizeof crc);
	put(at, &crc, sizeof crc);
	log->bytes = FILE_HEADER_BYTES;
}

void pv_xs_snapshot_start(struct pv_xs *hub, int fd)
{
	struct xs_journal *journal = &hub->journal;
	struct xs_log *log = &journal->snapshot;

	xs_crc_init();
	log->fd = fd;
	log->pending.n = 0;
	log->open = log->unsynced = 0;
	log->lost = 0;
	if (journal->epoch == 255) {
		journal->epoch = 0; /* and no node remembers another one, of a snapshot that was given up */
		for (struct xs_node *node = hub->root; node; node = node->newer)
			node->epoch = 0;
	}
	journal->epoch++;
	journal->done = 0;
	journal->next = hub->root;
	hub->loop.done_told = 0;
	start_file(log);
	record_generation(log, hub->generation);
	for (int name = 0; name < 2; name++)
		record_special(log, hub, name);
	for (uint32_t quota = 0; quota < PV_XS_N_QUOTAS; quota++)
		record_quota(log, quota, hub->limits.quotas[quota]);
	for (struct xs_domain *domain = NULL; (domain = xs_domain_next(hub, domain));) {
		if (domain->public.known)
			record_domain(log, &domain->public);
	}
	close_frame(log);
}

int pv_xs_snapshot_step(struct pv_xs *hub, uint32_t n_nodes)
{
	struct xs_journal *journal = &hub->journal;
	char path[XS_PATH_MAX + 1];
	int error;

	for (; journal->next && n_nodes; n_nodes--) {
		struct xs_node *node = journal->next;

		record_node(&journal->snapshot, path, xs_path_of(node, path), node->content, 0);
		node->epoch = journal->epoch;
		journal->next = node->newer;
		if (n_nodes % NODES_PER_FRAME == 0)
			close_frame(&journal->snapshot);
	}
	if (!journal->next && !journal->done) {
		*record(&journal->snapshot, 1) = COMPLETE;
		journal->done = 1;
	}
	close_frame(&journal->snapshot);
	error = write_out(&journal->snapshot, journal->done && journal->sync);
	return error ? error : journal->done;
}

void pv_xs_snapshot_adopt(struct pv_xs *hub)
{
	struct xs_journal *journal = &hub->journal;
	struct xs_log former = journal->log;

	journal->log = journal->snapshot;
	journal->base_bytes = journal->log.bytes;
	journal->snapshot = (struct xs_log){ .fd = -1 };
	journal->done = 0;
	hub->loop.full_told = 0;
	free(former.pending.data);
}

void pv_xs_snapshot_abort(struct pv_xs *hub)
{
	hub->loop.full_told = 0;
	hub->journal.base_bytes = hub->journal.log.bytes; /* tried again when it is that much longer */
	hub->journal.again_ms = hub->now_ms + XS_RETRY_MS;
	free(hub->journal.snapshot.pending.data);
	hub->journal.snapshot = (struct xs_log){ .fd = -1 };
	hub->journal.next = NULL;
	hub->journal.done = 0;
}

int xs_journal_needs_snapshot(const struct pv_xs *hub)
{
	const struct xs_journal *journal = &hub->journal;

	if (journal->log.fd < 0 || journal->snapshot.fd >= 0)
		return 0;
	if (journal->log.lost)
		return hub->now_ms >= journal->again_ms;
	return journal->log.bytes > LONG_BYTES + 2 * journal->base_bytes;
}
