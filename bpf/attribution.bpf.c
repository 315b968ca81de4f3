//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * attribution: who opened this connection?
 *
 *   connect4/6      the connecting task is `current`: note its cgroup, and the
 *                   socket's own, in the socket's sk_storage
 *   sock_ops        client: put a nonce on the SYN and on every segment until
 *                   data is acknowledged; pending[nonce] = the evidence
 *   sock_ops        server: the segment that completes the handshake carries
 *                   the nonce; move pending[nonce] to the accepted socket
 *   agent           reads the accepted socket's sk_storage by its own fd
 *
 * The addresses alone would not do: a pod can claim any address in its own
 * network namespace. The nonce alone would not do either: whoever sees a packet
 * could send it again, so the two ends of the connection are compared too, and
 * a nonce is good for one connection.
 *
 * A failure here never fails the connect: the connection has no evidence, and
 * the agent answers it with a status that clients retry.
 */
#include "latchkey.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* What the agent answers on, set at load. Ports in host order, addresses in
 * network order. */
volatile const __u32 ports[MAX_PORTS];
volatile const __u32 port_count;
volatile const __be32 addresses4[MAX_ADDRESSES];
volatile const __u32 address4_count;
volatile const __be32 addresses6[MAX_ADDRESSES][4];
volatile const __u32 address6_count;

/* The network namespace that the agent listens in, by inode: its own, which it
 * holds, so the number is not reused. */
volatile const __u32 agent_netns;

#ifdef LATCHKEY_PROOF
volatile const __u32 proof_off;
#endif

/* Where pods are: the kubepods cgroup. Only the bound per pod depends on it,
 * never the evidence. */
volatile const __u64 kubepods_id;

/* clients: evidence of a socket that connects to the agent. Freed with it. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct client);
} clients SEC(".maps");

/* accepted: the same, of a socket that the agent accepted. Freed with it. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct evidence);
} accepted SEC(".maps");

/* pending: evidence by nonce, from SYN to accept. An entry leaves when it is
 * accepted, when the client's socket closes, or when its pod's ring is full. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PENDING);
	__type(key, __u64);
	__type(value, struct handshake);
} pending SEC(".maps");

/* inflight: one ring per pod-level cgroup; the agent deletes those of pods that
 * have ended. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct ring);
} inflight SEC(".maps");

/* inflight_zero: a ring is too large for the stack; new ones are copied from
 * here. Never written. Without the lock's type, as the verifier lets no helper
 * read a lock. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct blank_ring);
} inflight_zero SEC(".maps");

/* qos: ids of the kubepods root's QoS directories, kept by the agent. Their
 * children are pods. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u64);
	__type(value, __u8);
} qos SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct siphash_key);
} nonce_key SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} nonce_seq SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, EVENT_MAX);
	__type(key, enum event);
	__type(value, __u64);
} events SEC(".maps");

#ifdef LATCHKEY_PROOF
/* proof_nonces: nonce by addresses, for PROOF_NONCE. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct peers);
	__type(value, __u64);
} proof_nonces SEC(".maps");
#endif

static __always_inline void count(__u32 event)
{
	__u64 *n = bpf_map_lookup_elem(&events, &event);

	if (n)
		(*n)++;
}

static __always_inline bool agent_port(__u32 port)
{
	for (__u32 i = 0; i < MAX_PORTS; i++) {
		if (i >= port_count)
			break;
		if (ports[i] == port)
			return true;
	}
	return false;
}

static __always_inline bool agent_address4(__be32 a)
{
	for (__u32 i = 0; i < MAX_ADDRESSES; i++) {
		if (i >= address4_count)
			break;
		if (addresses4[i] == a)
			return true;
	}
	return false;
}

static __always_inline bool agent_address6(__be32 a0, __be32 a1, __be32 a2, __be32 a3)
{
	/* ::ffff:a.b.c.d: an IPv6 socket that speaks IPv4. */
	if (a0 == 0 && a1 == 0 && a2 == bpf_htonl(0xffff))
		return agent_address4(a3);
	for (__u32 i = 0; i < MAX_ADDRESSES; i++) {
		if (i >= address6_count)
			break;
		if (addresses6[i][3] == a3 && addresses6[i][0] == a0 && addresses6[i][1] == a1 &&
		    addresses6[i][2] == a2)
			return true;
	}
	return false;
}

/* socket_cgroup is the id of the cgroup whose task created the socket. */
static __always_inline __u64 socket_cgroup(struct sock *sk)
{
	if (bpf_core_field_exists(sk->sk_cgrp_data.cgroup)) {
		struct cgroup *cg = sk->sk_cgrp_data.cgroup;

		return cg ? cg->kn->id : 0;
	}

	/* Linux before 5.15: bit 0 says that the word is a v1 class id and not
	 * a pointer, and then the socket's cgroup is not known. Bit 1 marks an
	 * uncounted reference. */
	struct sock_cgroup_data___old *old = (void *)&sk->sk_cgrp_data;
	__u64 val = old->val;
	struct cgroup *cg = (struct cgroup *)(val & ~3ULL);

	if ((val & 1) || !cg)
		return 0;
	return BPF_CORE_READ(cg, kn, id);
}

/* bound_owner is the cgroup that a handshake is counted for: the pod-level one,
 * so that a pod gains nothing by making more cgroups below its own. */
static __always_inline __u64 bound_owner(void)
{
	if (!PROTECTED(POD_BOUND))
		return 0;
	/* How deep the kubepods cgroup is depends on what the node itself runs
	 * in (kind, a cgroup of its own in tests): looked for, not configured. */
	for (int level = 0; level < MAX_KUBEPODS_LEVEL; level++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(level);

		if (!id)
			break;
		if (id != kubepods_id)
			continue;
		id = bpf_get_current_ancestor_cgroup_id(level + 1);
		if (id && bpf_map_lookup_elem(&qos, &id)) {
			__u64 pod = bpf_get_current_ancestor_cgroup_id(level + 2);

			if (pod)
				return pod;
		}
		if (id)
			return id;
		break;
	}
	/* Outside every pod: by the top-level slice. */
	return bpf_get_current_ancestor_cgroup_id(1);
}

/* forget takes back a nonce that nobody has used. */
static __always_inline void forget(struct client *c)
{
	__u64 nonce = c->nonce;

	if (!nonce)
		return;
	c->nonce = 0;
	if (!PROTECTED(CONSUME_ONCE))
		return;
	if (bpf_map_delete_elem(&pending, &nonce) == 0)
		count(EVENT_CLOSED_UNUSED);
}

/* note runs in the context of the task that calls connect, with the socket
 * locked. */
static __always_inline int note(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *bsk = ctx->sk;
	struct client *c;
	struct sock *sk;

	if (ctx->protocol != IPPROTO_TCP || !bsk)
		return 1;
	c = bpf_sk_storage_get(&clients, bsk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!c) {
		count(EVENT_ERR_CLIENT_STORAGE);
		return 1;
	}
	/* A socket can be disconnected, handed on and connected again: nothing
	 * of its earlier life may remain. */
	c->armed = 0;
	forget(c);

	sk = (struct sock *)bpf_skc_to_tcp_sock(bsk);
	if (!sk) {
		count(EVENT_ERR_NO_TCP_SOCK);
		return 1;
	}
	c->ev.task_cgroup = bpf_get_current_cgroup_id();
	c->ev.socket_cgroup = socket_cgroup(sk);
	c->ev.netns_cookie = bpf_get_netns_cookie(ctx);
	c->ev.netns_inode = sk->__sk_common.skc_net.net->ns.inum;
	c->ev.socket_cookie = bpf_get_socket_cookie(ctx);
	c->ev.connected_ns = bpf_ktime_get_ns();
	c->ev.tgid = bpf_get_current_pid_tgid() >> 32;
	c->ev.uid = (__u32)bpf_get_current_uid_gid();
	c->owner = bound_owner();
	c->armed = 1;
	count(EVENT_CONNECT);
	return 1;
}

SEC("cgroup/connect4")
int latchkey_connect4(struct bpf_sock_addr *ctx)
{
	/* Destination first: for all other connections of the node this is the
	 * whole cost. */
	if (!agent_address4(ctx->user_ip4) || !agent_port(bpf_ntohs((__u16)ctx->user_port)))
		return 1;
	return note(ctx);
}

SEC("cgroup/connect6")
int latchkey_connect6(struct bpf_sock_addr *ctx)
{
	if (!agent_port(bpf_ntohs((__u16)ctx->user_port)))
		return 1;
	if (!agent_address6(ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]))
		return 1;
	return note(ctx);
}

/* The compiler would load through a computed address what differs only in its
 * offset, and the verifier refuses that of a context. */
#define CTX(field)                                                                                            \
	({                                                                                                    \
		__u64 value;                                                                                  \
		asm volatile("%[value] = *(u32 *)(%[ctx] + %[offset])"                                        \
			     : [value] "=r"(value)                                                            \
			     : [ctx] "r"(ctx), [offset] "i"(__builtin_offsetof(struct bpf_sock_ops, field))); \
		(__be32) value;                                                                               \
	})

/* remote and local fill one end in v4-mapped form; false: not an IP socket. */
static __always_inline bool remote(struct bpf_sock_ops *ctx, __be32 *a)
{
	if (ctx->family == AF_INET) {
		a[0] = 0;
		a[1] = 0;
		a[2] = bpf_htonl(0xffff);
		a[3] = CTX(remote_ip4);
		return true;
	}
	if (ctx->family != AF_INET6)
		return false;
	a[0] = CTX(remote_ip6[0]);
	a[1] = CTX(remote_ip6[1]);
	a[2] = CTX(remote_ip6[2]);
	a[3] = CTX(remote_ip6[3]);
	return true;
}

static __always_inline bool local(struct bpf_sock_ops *ctx, __be32 *a)
{
	if (ctx->family == AF_INET) {
		a[0] = 0;
		a[1] = 0;
		a[2] = bpf_htonl(0xffff);
		a[3] = CTX(local_ip4);
		return true;
	}
	if (ctx->family != AF_INET6)
		return false;
	a[0] = CTX(local_ip6[0]);
	a[1] = CTX(local_ip6[1]);
	a[2] = CTX(local_ip6[2]);
	a[3] = CTX(local_ip6[3]);
	return true;
}

static __always_inline bool same_peers(const struct peers *a, const struct peers *b)
{
	__u32 differ = (a->client_port ^ b->client_port) | (a->server_port ^ b->server_port);

	for (int i = 0; i < 4; i++)
		differ |= (a->client[i] ^ b->client[i]) | (a->server[i] ^ b->server[i]);
	return differ == 0;
}

static __always_inline __u64 new_nonce(__u64 socket_cookie)
{
	__u32 zero = 0;
	struct siphash_key *key = bpf_map_lookup_elem(&nonce_key, &zero);
	__u64 *seq = bpf_map_lookup_elem(&nonce_seq, &zero);

	/* An unset key would make nonces that anybody can compute. */
	if (!key || !seq || (key->k0 == 0 && key->k1 == 0)) {
		count(EVENT_ERR_NO_KEY);
		return 0;
	}
	/* Socket, sequence per CPU and time: no two handshakes share an input. */
	return siphash24(key, socket_cookie, ++*seq, bpf_ktime_get_ns());
}

/* take_slot enters the nonce in its owner's ring, and drops the pending entry
 * of the one it displaces. */
static __always_inline bool take_slot(__u64 owner, __u64 nonce)
{
	struct ring *ring = bpf_map_lookup_elem(&inflight, &owner);
	__u64 displaced;
	__u32 i;

	if (!ring) {
		__u32 zero = 0;
		struct blank_ring *blank = bpf_map_lookup_elem(&inflight_zero, &zero);

		if (!blank)
			return false;
		/* Another CPU may be first; either way there is one now. */
		bpf_map_update_elem(&inflight, &owner, blank, BPF_NOEXIST);
		ring = bpf_map_lookup_elem(&inflight, &owner);
		if (!ring)
			return false;
	}
	bpf_spin_lock(&ring->lock);
	i = ring->next & (INFLIGHT_PER_POD - 1);
	displaced = ring->nonce[i];
	ring->nonce[i] = nonce;
	ring->next = i + 1;
	bpf_spin_unlock(&ring->lock);

	if (displaced && bpf_map_delete_elem(&pending, &displaced) == 0)
		count(EVENT_EVICTED);
	return true;
}

/* begin runs on the client when the SYN is about to be made. */
static __always_inline void begin(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct handshake p = {};
	struct client *c;
	__u64 nonce;

	if (!agent_port(bpf_ntohl(ctx->remote_port)) || !sk)
		return;
	c = bpf_sk_storage_get(&clients, sk, 0, 0);
	if (!c || !c->armed)
		return;
	/* Evidence is good for the one handshake that follows its connect. */
	c->armed = 0;

	if (!remote(ctx, p.peers.server) || !local(ctx, p.peers.client))
		return;
	/* Another program may have rewritten the destination after our hook saw
	 * it: then this handshake goes to somebody else, who must not get a
	 * nonce. */
	if (!agent_address6(p.peers.server[0], p.peers.server[1], p.peers.server[2], p.peers.server[3]))
		return;
	p.peers.client_port = ctx->local_port;
	p.peers.server_port = bpf_ntohl(ctx->remote_port);
	p.ev = c->ev;

	nonce = new_nonce(c->ev.socket_cookie);
	if (!nonce)
		return;
	/* The slot first: an entry without a slot could outlive its bound. */
	if (!take_slot(c->owner, nonce)) {
		count(EVENT_ERR_INFLIGHT);
		return;
	}
	if (bpf_map_update_elem(&pending, &nonce, &p, BPF_NOEXIST)) {
		count(EVENT_ERR_PENDING);
		return;
	}
#ifdef LATCHKEY_PROOF
	if (!PROTECTED(NONCE))
		bpf_map_update_elem(&proof_nonces, &p.peers, &nonce, BPF_ANY);
#endif
	c->nonce = nonce;
	/* cb_flags_set replaces what is there, and what is there may be another
	 * program's. */
	if (bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG |
						   BPF_SOCK_OPS_STATE_CB_FLAG)) {
		count(EVENT_ERR_FLAGS);
		forget(c);
		return;
	}
	count(EVENT_NONCE_SENT);
}

/* reserve asks for room in a segment, until data is acknowledged: then the
 * server has accepted a segment that had the option. bytes_acked counts the SYN
 * as one. */
static __always_inline void reserve(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct client *c;

	if (!agent_port(bpf_ntohl(ctx->remote_port)) || !sk)
		return;
	c = bpf_sk_storage_get(&clients, sk, 0, 0);
	if (!c || !c->nonce)
		return;
	if (ctx->bytes_acked > 1) {
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
		return;
	}
	if (bpf_reserve_hdr_opt(ctx, sizeof(struct option), 0))
		count(EVENT_ERR_OPTION_SPACE);
}

static __always_inline void write_option(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct option opt = {
		.kind = OPTION_KIND,
		.len = sizeof(opt),
		.exid = {OPTION_EXID_HI, OPTION_EXID_LO},
	};
	struct client *c;

	if (!agent_port(bpf_ntohl(ctx->remote_port)) || !sk)
		return;
	c = bpf_sk_storage_get(&clients, sk, 0, 0);
	if (!c || !c->nonce || ctx->bytes_acked > 1)
		return;
	__builtin_memcpy(opt.nonce, &c->nonce, sizeof(opt.nonce));
	/* No room was reserved if `reserve` could not; it has counted that. */
	if (bpf_store_hdr_opt(ctx, &opt, sizeof(opt), 0))
		count(EVENT_ERR_OPTION_WRITE);
}

/* end runs on the client when its socket changes state. */
static __always_inline void end(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct client *c;

	if (ctx->args[1] != TCP_STATE_CLOSE || !agent_port(bpf_ntohl(ctx->remote_port)) || !sk)
		return;
	c = bpf_sk_storage_get(&clients, sk, 0, 0);
	if (c)
		forget(c);
}

/* arrive runs on the server when the handshake is complete, before accept(2)
 * can return the socket: the kernel holds the child's lock until this is over. */
static __always_inline void arrive(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct option opt = {
		.kind = OPTION_KIND,
		.len = 4, /* search: kind and 16-bit ExID */
		.exid = {OPTION_EXID_HI, OPTION_EXID_LO},
	};
	struct peers at = {};
	struct handshake *p;
	struct evidence ev;
	struct evidence *slot;
	struct sock *full;
	__u64 nonce;
	int ret;

	if (!agent_port(ctx->local_port) || !sk)
		return;
	if (!remote(ctx, at.client) || !local(ctx, at.server))
		return;
	if (!agent_address6(at.server[0], at.server[1], at.server[2], at.server[3]))
		return;
	/* A pod can have a network namespace in which the agent's address is its
	 * own, and listen there. Evidence is for the agent's listener: else a
	 * nonce seen on the wire could be used up there, and its owner would come
	 * without. */
	full = (struct sock *)bpf_skc_to_tcp_sock(sk);
	if (!full) {
		count(EVENT_ERR_NO_TCP_SOCK);
		return;
	}
	if (PROTECTED(AGENT_NETNS) && full->__sk_common.skc_net.net->ns.inum != agent_netns)
		return;
	at.client_port = bpf_ntohl(ctx->remote_port);
	at.server_port = ctx->local_port;

#ifdef LATCHKEY_PROOF
	if (!PROTECTED(NONCE)) {
		__u64 *known = bpf_map_lookup_elem(&proof_nonces, &at);

		if (known) {
			nonce = *known;
			goto found;
		}
	}
#endif
	/* Flags 0: from the segment being received, not from a saved SYN, which
	 * does not exist under SYN cookies. */
	ret = bpf_load_hdr_opt(ctx, &opt, sizeof(opt), 0);
	if (ret != sizeof(opt)) {
		count(ret == -ENOMSG ? EVENT_NO_OPTION : EVENT_ERR_OPTION_READ);
		return;
	}
	__builtin_memcpy(&nonce, opt.nonce, sizeof(nonce));
#ifdef LATCHKEY_PROOF
found:
#endif
	p = bpf_map_lookup_elem(&pending, &nonce);
	if (!p) {
		count(EVENT_NONCE_UNKNOWN);
		return;
	}
	/* A nonce seen on the wire and sent again from elsewhere. The entry
	 * stays: its owner's handshake may still be on its way. */
	if (PROTECTED(PEER_TUPLE) && !same_peers(&p->peers, &at)) {
		count(EVENT_PEER_MISMATCH);
		return;
	}
	ev = p->ev;
	/* Consumed once: of two CPUs that found it, one deletes it. */
	if (PROTECTED(CONSUME_ONCE) && bpf_map_delete_elem(&pending, &nonce)) {
		count(EVENT_NONCE_RACE);
		return;
	}
	slot = bpf_sk_storage_get(&accepted, sk, &ev, BPF_SK_STORAGE_GET_F_CREATE);
	if (!slot) {
		count(EVENT_ERR_ACCEPTED_STORAGE);
		return;
	}
	count(EVENT_ATTESTED);
}

SEC("sockops")
int latchkey_sockops(struct bpf_sock_ops *ctx)
{
	/* ctx->reply is not touched: it may hold another program's answer. */
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		begin(ctx);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		reserve(ctx);
		break;
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
		write_option(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		end(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		arrive(ctx);
		break;
	}
	return 1;
}
