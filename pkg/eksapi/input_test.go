// SPDX-License-Identifier: Apache-2.0

package eksapi_test

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/eksapi"
)

// What a stranger or a broken client sends is answered with a documented error
// in JSON, and changes nothing.
func TestBadInput(t *testing.T) {
	w := newWorld(t, nil)
	id := w.create("web", "api", role("api"))
	const collection = "/clusters/prod/pod-identity-associations"
	const exchange = "/clusters/prod/assume-role-for-pod-identity"
	one := collection + "/" + id
	tags := "/tags/arn:aws:eks:" + region + ":" + account + ":podidentityassociation/prod/" + id
	good := `"namespace":"web","serviceAccount":"x","roleArn":"` + role("x") + `"`
	many := make([]string, 51)
	for i := range many {
		many[i] = fmt.Sprintf("%q:%q", fmt.Sprint(i), "x")
	}
	keys := strings.TrimSuffix(strings.Repeat("tagKeys=x&", 51), "&")
	for name, c := range map[string]struct {
		raw
		status int
		code   string
	}{
		// Routes.
		"root":                     {raw{method: "GET", path: "/"}, 404, "UnknownOperationException"},
		"unknown route":            {raw{path: "/clusters/prod/addons"}, 404, "UnknownOperationException"},
		"unknown, unsigned":        {raw{path: "/x", unsigned: true}, 404, "UnknownOperationException"},
		"clusters":                 {raw{method: "GET", path: "/clusters"}, 404, "UnknownOperationException"},
		"no cluster":               {raw{method: "GET", path: "/clusters//pod-identity-associations"}, 404, "UnknownOperationException"},
		"trailing slash":           {raw{method: "GET", path: collection + "/"}, 404, "UnknownOperationException"},
		"too deep":                 {raw{method: "GET", path: one + "/x"}, 404, "UnknownOperationException"},
		"dots":                     {raw{method: "GET", path: "/clusters/dev/../prod/pod-identity-associations"}, 404, "UnknownOperationException"},
		"double slash":             {raw{method: "GET", path: "//clusters/prod/pod-identity-associations"}, 404, "UnknownOperationException"},
		"route in another case":    {raw{method: "GET", path: "/Clusters/prod/pod-identity-associations"}, 404, "UnknownOperationException"},
		"no ARN":                   {raw{method: "GET", path: "/tags/"}, 404, "UnknownOperationException"},
		"PUT":                      {raw{method: "PUT", path: one, body: "{}"}, 405, "UnknownOperationException"},
		"PATCH":                    {raw{method: "PATCH", path: one, body: "{}"}, 405, "UnknownOperationException"},
		"OPTIONS":                  {raw{method: "OPTIONS", path: one}, 405, "UnknownOperationException"},
		"made-up method":           {raw{method: "FOO", path: one}, 405, "UnknownOperationException"},
		"DELETE of the collection": {raw{method: "DELETE", path: collection}, 405, "UnknownOperationException"},
		"GET of the exchange":      {raw{method: "GET", path: exchange}, 405, "UnknownOperationException"},
		// Names.
		"cluster with dots":      {raw{method: "GET", path: "/clusters/..%2Fprod/pod-identity-associations"}, 404, "ResourceNotFoundException"},
		"cluster with a slash":   {raw{method: "GET", path: "/clusters/prod%2Fx/pod-identity-associations"}, 404, "ResourceNotFoundException"},
		"cluster, lookalike":     {raw{method: "GET", path: "/clusters/pr%D0%BEd/pod-identity-associations"}, 404, "ResourceNotFoundException"},
		"cluster with a NUL":     {raw{method: "GET", path: "/clusters/prod%00/pod-identity-associations"}, 404, "ResourceNotFoundException"},
		"cluster, full width":    {raw{method: "GET", path: "/clusters/%EF%BD%90rod/pod-identity-associations"}, 404, "ResourceNotFoundException"},
		"cluster in other case":  {raw{method: "GET", path: "/clusters/PROD/pod-identity-associations"}, 404, "ResourceNotFoundException"},
		"cluster with a newline": {raw{method: "GET", path: "/clusters/a%0Ab/pod-identity-associations"}, 404, "ResourceNotFoundException"},
		"long cluster, denied":   {raw{user: "NOBODY", method: "GET", path: "/clusters/" + strings.Repeat("a", 4000) + "%0A/pod-identity-associations"}, 403, "AccessDeniedException"},
		"long cluster, exchange": {raw{path: "/clusters/" + strings.Repeat("%C3%A4", 1000) + "/assume-role-for-pod-identity", body: "{}"}, 404, "ResourceNotFoundException"},
		"long ARN":               {raw{user: "NOBODY", method: "GET", path: "/tags/arn:aws:eks:" + region + ":" + account + ":cluster/" + strings.Repeat("x", 4000)}, 400, "BadRequestException"},
		"long cluster":           {raw{method: "GET", path: "/clusters/" + strings.Repeat("a", 4000) + "/pod-identity-associations"}, 404, "ResourceNotFoundException"},
		"id with dots":           {raw{method: "GET", path: collection + "/a-%2E%2E%2F%2E%2E%2F%2E%2E%2F%2E%2E%2F%2E%2E%2F%2E%2E"}, 404, "ResourceNotFoundException"},
		"id of 19 other letters": {raw{method: "GET", path: collection + "/" + strings.Repeat("%C3%A4", 19)}, 404, "ResourceNotFoundException"},
		"short id":               {raw{method: "DELETE", path: collection + "/a-1"}, 400, "InvalidParameterException"},
		// Bodies.
		"empty body":              {raw{path: collection}, 400, "InvalidParameterException"},
		"no JSON":                 {raw{path: collection, body: "namespace=web"}, 400, "InvalidParameterException"},
		"array":                   {raw{path: collection, body: "[]"}, 400, "InvalidParameterException"},
		"null":                    {raw{path: collection, body: "null"}, 400, "InvalidParameterException"},
		"string":                  {raw{path: collection, body: `"x"`}, 400, "InvalidParameterException"},
		"cut":                     {raw{path: collection, body: "{" + good}, 400, "InvalidParameterException"},
		"two objects":             {raw{path: collection, body: "{" + good + "}{}"}, 400, "InvalidParameterException"},
		"trailing comma":          {raw{path: collection, body: "{" + good + ",}"}, 400, "InvalidParameterException"},
		"comment":                 {raw{path: collection, body: "{" + good + "/**/}"}, 400, "InvalidParameterException"},
		"byte order mark":         {raw{path: collection, body: "\ufeff{" + good + "}"}, 400, "InvalidParameterException"},
		"not UTF-8":               {raw{path: collection, body: "{" + good + ",\"x\":\"\xff\"}"}, 400, "InvalidParameterException"},
		"empty object":            {raw{path: collection, body: "{}"}, 400, "InvalidParameterException"},
		"deep array":              {raw{path: collection, body: "{" + good + `,"x":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + "}"}, 400, "InvalidParameterException"},
		"deep object":             {raw{path: collection, body: "{" + good + `,"x":` + strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100) + "}"}, 400, "InvalidParameterException"},
		"only brackets":           {raw{path: collection, body: strings.Repeat("[", 100000)}, 400, "InvalidParameterException"},
		"large":                   {raw{path: collection, body: "{" + good + `,"x":"` + strings.Repeat("x", eksapi.MaxBody) + `"}`}, 400, "InvalidRequestException"},
		"large, tags":             {raw{path: tags, body: `{"tags":{"x":"` + strings.Repeat("x", eksapi.MaxBody) + `"}}`}, 400, "BadRequestException"},
		"large token":             {raw{path: exchange, body: `{"token":"` + strings.Repeat("x", eksapi.MaxExchangeBody) + `"}`}, 400, "InvalidRequestException"},
		"number as string":        {raw{path: collection, body: `{"namespace":1,"serviceAccount":"x","roleArn":"` + role("x") + `"}`}, 400, "InvalidParameterException"},
		"string as bool":          {raw{path: collection, body: "{" + good + `,"disableSessionTags":"true"}`}, 400, "InvalidParameterException"},
		"number as bool":          {raw{path: collection, body: "{" + good + `,"disableSessionTags":1}`}, 400, "InvalidParameterException"},
		"array as tags":           {raw{path: collection, body: "{" + good + `,"tags":[]}`}, 400, "InvalidParameterException"},
		"string as tags":          {raw{path: collection, body: "{" + good + `,"tags":"a=b"}`}, 400, "InvalidParameterException"},
		"number as tag":           {raw{path: collection, body: "{" + good + `,"tags":{"a":1}}`}, 400, "InvalidParameterException"},
		"null as tag":             {raw{path: collection, body: "{" + good + `,"tags":{"a":null}}`}, 400, "InvalidParameterException"},
		"object as policy":        {raw{path: collection, body: "{" + good + `,"disableSessionTags":true,"policy":{"a":1}}`}, 400, "InvalidParameterException"},
		"array as role":           {raw{path: one, body: `{"roleArn":["` + role("x") + `"]}`}, 400, "InvalidParameterException"},
		"string as bool, update":  {raw{path: one, body: `{"disableSessionTags":"false"}`}, 400, "InvalidParameterException"},
		"member twice":            {raw{path: collection, body: "{" + good + `,"namespace":"web"}`}, 400, "InvalidParameterException"},
		"member twice, once null": {raw{path: collection, body: `{"roleArn":null,` + good + "}"}, 400, "InvalidParameterException"},
		"member twice, escaped":   {raw{path: collection, body: "{" + good + `,"n\u0061mespace":"db"}`}, 400, "InvalidParameterException"},
		"members in other case":   {raw{path: collection, body: `{"Namespace":"web","ServiceAccount":"x","RoleArn":"` + role("x") + `"}`}, 400, "InvalidParameterException"},
		"51 tags":                 {raw{path: collection, body: "{" + good + `,"tags":{` + strings.Join(many, ",") + `}}`}, 400, "InvalidParameterException"},
		"aws: tag":                {raw{path: collection, body: "{" + good + `,"tags":{"aws:x":"y"}}`}, 400, "InvalidParameterException"},
		"Aws: tag":                {raw{path: collection, body: "{" + good + `,"tags":{"Aws:x":"y"}}`}, 400, "InvalidParameterException"},
		"aws: tag, long s":        {raw{path: collection, body: "{" + good + `,"tags":{"awſ:x":"y"}}`}, 400, "InvalidParameterException"},
		"namespace, lookalike":    {raw{path: collection, body: `{"namespace":"wеb","serviceAccount":"x","roleArn":"` + role("x") + `"}`}, 400, "InvalidParameterException"},
		"namespace with a dot":    {raw{path: collection, body: `{"namespace":"a.b","serviceAccount":"x","roleArn":"` + role("x") + `"}`}, 400, "InvalidParameterException"},
		"namespace with a slash":  {raw{path: collection, body: `{"namespace":"a/b","serviceAccount":"x","roleArn":"` + role("x") + `"}`}, 400, "InvalidParameterException"},
		"account with a slash":    {raw{path: collection, body: `{"namespace":"web","serviceAccount":"a/b","roleArn":"` + role("x") + `"}`}, 400, "InvalidParameterException"},
		"account with a newline":  {raw{path: collection, body: `{"namespace":"web","serviceAccount":"a\n","roleArn":"` + role("x") + `"}`}, 400, "InvalidParameterException"},
		"account, dots only":      {raw{path: collection, body: `{"namespace":"web","serviceAccount":"..","roleArn":"` + role("x") + `"}`}, 400, "InvalidParameterException"},
		"role with a newline":     {raw{path: collection, body: `{"namespace":"web","serviceAccount":"x","roleArn":"` + role(`x\n`) + `"}`}, 400, "InvalidParameterException"},
		"no token":                {raw{path: exchange, body: "{}"}, 400, "InvalidParameterException"},
		"empty token":             {raw{path: exchange, body: `{"token":""}`}, 400, "InvalidParameterException"},
		"number as token":         {raw{path: exchange, body: `{"token":1}`}, 400, "InvalidParameterException"},
		"no token at all":         {raw{path: exchange}, 400, "InvalidParameterException"},
		"no tags":                 {raw{path: tags, body: "{}"}, 400, "BadRequestException"},
		"wrong tags":              {raw{path: tags, body: `{"tags":["a"]}`}, 400, "BadRequestException"},
		"tags, no JSON":           {raw{path: tags, body: `{`}, 400, "BadRequestException"},
		"tags twice":              {raw{path: tags, body: `{"tags":{"a":"b","a":"c"}}`}, 400, "BadRequestException"},
		"no tag keys":             {raw{method: "DELETE", path: tags}, 400, "BadRequestException"},
		"51 tag keys":             {raw{method: "DELETE", path: tags + "?" + keys}, 400, "BadRequestException"},
		"empty tag key":           {raw{method: "DELETE", path: tags + "?tagKeys="}, 400, "BadRequestException"},
		"long tag key":            {raw{method: "DELETE", path: tags + "?tagKeys=" + strings.Repeat("x", 129)}, 400, "BadRequestException"},
		"tags of no ARN":          {raw{method: "GET", path: "/tags/nonsense"}, 400, "BadRequestException"},
		"tags of a role":          {raw{method: "GET", path: "/tags/" + role("x")}, 400, "BadRequestException"},
		"tags of no id":           {raw{method: "GET", path: "/tags/arn:aws:eks:" + region + ":" + account + ":podidentityassociation/prod"}, 400, "BadRequestException"},
		// Queries.
		"no number":    {raw{method: "GET", path: collection + "?maxResults=many"}, 400, "InvalidParameterException"},
		"empty number": {raw{method: "GET", path: collection + "?maxResults="}, 400, "InvalidParameterException"},
		"fraction":     {raw{method: "GET", path: collection + "?maxResults=1.5"}, 400, "InvalidParameterException"},
		"too great":    {raw{method: "GET", path: collection + "?maxResults=99999999999999999999"}, 400, "InvalidParameterException"},
		"number twice": {raw{method: "GET", path: collection + "?maxResults=1&maxResults=2"}, 400, "InvalidParameterException"},
		"made-up page": {raw{method: "GET", path: collection + "?nextToken=AAAA"}, 400, "InvalidParameterException"},
		"long page":    {raw{method: "GET", path: collection + "?nextToken=" + strings.Repeat("A", 10000)}, 400, "InvalidParameterException"},
		// Signatures.
		"unsigned":                    {raw{path: collection, body: "{" + good + "}", unsigned: true}, 403, "MissingAuthenticationTokenException"},
		"mis-signed":                  {raw{path: collection, body: "{" + good + "}", secret: "wrong"}, 403, "InvalidSignatureException"},
		"unknown key":                 {raw{path: collection, body: "{" + good + "}", user: "GHOST"}, 403, "UnrecognizedClientException"},
		"expired key":                 {raw{path: collection, body: "{" + good + "}", user: "EXPIRED"}, 403, "ExpiredTokenException"},
		"stale":                       {raw{path: collection, body: "{" + good + "}", at: time.Now().Add(-6 * time.Minute)}, 403, "InvalidSignatureException"},
		"of the future":               {raw{path: collection, body: "{" + good + "}", at: time.Now().Add(6 * time.Minute)}, 403, "InvalidSignatureException"},
		"other service":               {raw{path: collection, body: "{" + good + "}", service: "iam"}, 403, "InvalidSignatureException"},
		"other region":                {raw{path: collection, body: "{" + good + "}", region: "us-east-1"}, 403, "InvalidSignatureException"},
		"other method":                {raw{method: "GET", path: one, tamper: func(r *http.Request) { r.Method = "DELETE" }}, 403, "InvalidSignatureException"},
		"other path":                  {raw{method: "DELETE", path: one + "x", tamper: func(r *http.Request) { r.URL.Path = one }}, 403, "InvalidSignatureException"},
		"garbage":                     {raw{path: collection, header: http.Header{"Authorization": {"AWS4-HMAC-SHA256 x"}}, unsigned: true}, 403, "IncompleteSignatureException"},
		"unsigned, exchange":          {raw{path: exchange, body: "{}", unsigned: true}, 403, "MissingAuthenticationTokenException"},
		"for the other API, exchange": {raw{path: exchange, body: "{}", service: "eks"}, 403, "InvalidSignatureException"},
		"presigned":                   {raw{method: "GET", path: collection + "?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=00", unsigned: true}, 403, "InvalidSignatureException"},
		"unsigned payload":            {raw{path: collection, body: "{" + good + "}", header: http.Header{"X-Amz-Content-Sha256": {"UNSIGNED-PAYLOAD"}}}, 403, "IncompleteSignatureException"},
	} {
		t.Run(name, func(t *testing.T) {
			w.unchanged(func() {
				a := w.send(c.raw)
				if a.status != c.status || a.code() != c.code {
					t.Fatalf("got %d %s %s, want %d %s", a.status, a.code(), a.body, c.status, c.code)
				}
				if m := a.message(t); m == "" || len(a.body) > 1000 || strings.ContainsAny(m, "\x00\n") {
					t.Errorf("message %q", m)
				}
			})
		})
	}
}

// A request that is sent again while its date is good does no more than the
// first; later it does nothing.
func TestReplay(t *testing.T) {
	at := time.Now()
	clock := at
	w := newWorld(t, func(c *eksapi.Config) { c.Now = func() time.Time { return clock } })
	r := raw{path: "/clusters/prod/pod-identity-associations", at: at,
		body: `{"namespace":"web","serviceAccount":"x","roleArn":"` + role("x") + `","clientRequestToken":"t"}`}
	first := w.send(r)
	if first.status != 200 {
		t.Fatal(first.body)
	}
	w.unchanged(func() {
		if again := w.send(r); again.status != 200 || again.body != first.body {
			t.Errorf("at once: %d %s", again.status, again.body)
		}
		clock = at.Add(6 * time.Minute)
		w.refused(r, 403, "InvalidSignatureException")
	})
}

// A body without an announced length is bounded as well.
func TestLargeBodyInChunks(t *testing.T) {
	w := newWorld(t, nil)
	conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	go func() {
		at := time.Now().UTC()
		fmt.Fprintf(conn, "POST /clusters/prod/pod-identity-associations HTTP/1.1\r\nHost: x\r\nX-Amz-Date: %s\r\n"+
			"Authorization: AWS4-HMAC-SHA256 Credential=ADMIN/%s/"+region+"/eks/aws4_request, SignedHeaders=host;x-amz-date, Signature=%s\r\n"+
			"Transfer-Encoding: chunked\r\n\r\n", at.Format("20060102T150405Z"), at.Format("20060102"), strings.Repeat("0", 64))
		for range 100 {
			if _, err := fmt.Fprintf(conn, "2000\r\n%s\r\n", strings.Repeat("x", 0x2000)); err != nil {
				return
			}
		}
	}()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != 400 || res.Header.Get("X-Amzn-Errortype") != "InvalidRequestException" {
		t.Errorf("got %d %v", res.StatusCode, res.Header)
	}
}
