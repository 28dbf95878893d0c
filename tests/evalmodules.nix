# As much of Nixpkgs' `lib` as Bento's modules use, so that the tests can evaluate them where there is no Nixpkgs.
# Where there is one (BENTO_NIXPKGS_LIB), they check that both give the same.
let
  inherit (builtins)
    all
    any
    attrNames
    attrValues
    concatLists
    concatMap
    concatStringsSep
    elem
    filter
    foldl'
    head
    isAttrs
    isBool
    isFunction
    isInt
    isList
    isString
    length
    listToAttrs
    map
    mapAttrs
    match
    sort
    stringLength
    substring
    tail
    toJSON
    typeOf
    ;

  # --- properties of definitions ---

  isProperty = kind: value: isAttrs value && value._type or "" == kind;

  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkOrder = priority: content: {
    _type = "order";
    inherit priority content;
  };

  # A module's definitions as a list of plain attribute sets. Conditions move inwards unevaluated: they may depend on
  # what is being evaluated.
  pushDown =
    definitions:
    if isProperty "merge" definitions then
      concatMap pushDown definitions.contents
    else if isProperty "if" definitions then
      map (mapAttrs (_: mkIf definitions.condition)) (pushDown definitions.content)
    else
      [ definitions ];

  # One option's definition as a list of { value, priority, order }.
  discharge =
    priority: order: value:
    if isProperty "merge" value then
      concatMap (discharge priority order) value.contents
    else if isProperty "if" value then
      if value.condition then discharge priority order value.content else [ ]
    else if isProperty "override" value then
      discharge value.priority order value.content
    else if isProperty "order" value then
      discharge priority value.priority value.content
    else
      [ { inherit value priority order; } ];

  # The values that count, in order.
  strongest =
    definitions:
    let
      found = concatMap (discharge 100 1000) definitions;
      first = foldl' (a: b: if b < a then b else a) 9999 (map (d: d.priority) found);
    in
    map (d: d.value) (sort (a: b: a.order < b.order) (filter (d: d.priority == first) found));

  # --- types: `check` a value, `merge` at least one of them ---

  one =
    where: values:
    if all (v: v == head values) (tail values) then head values else throw "${where}: conflicting definitions";

  mkType = name: check: {
    inherit name check;
    merge = one;
  };

  merged =
    where: type: values:
    if values == [ ] then
      throw "The option `${where}' was accessed but has no value defined. Try setting the option."
    else if all type.check values then
      type.merge where values
    else
      throw "A definition for option `${where}' is not of type `${type.name}', but a ${typeOf (head values)}";

  types = rec {
    anything = {
      name = "anything";
      check = _: true;
      merge =
        where: values:
        if all (v: isAttrs v && v.type or "" != "derivation") values then
          (attrsOf anything).merge where values
        else if length values > 1 && all isList values then
          concatLists values
        else
          one where values;
    };
    raw = mkType "raw" (_: true);
    bool = mkType "bool" isBool;
    str = mkType "string" isString;
    singleLineStr = mkType "line" (v: isString v && match "[^\n\r]*" v != null);
    lines = str // {
      merge = _: concatStringsSep "\n";
    };
    strMatching = pattern: mkType "string matching ${pattern}" (v: isString v && match pattern v != null);
    path = mkType "absolute path" (v: substring 0 1 (toString v) == "/");
    port = mkType "port" (v: isInt v && v >= 0 && v <= 65535);
    ints.positive = mkType "positive integer" (v: isInt v && v > 0);
    package = mkType "package" (v: v.type or "" == "derivation");
    enum = values: mkType "one of ${toJSON values}" (v: elem v values);
    listOf = type: {
      name = "list of ${type.name}";
      check = v: isList v && all type.check v;
      merge = _: concatLists;
    };
    attrsOf = type: {
      name = "attributes of ${type.name}";
      check = isAttrs;
      merge =
        where: values:
        let
          sets = concatMap pushDown values;
          names = attrNames (foldl' (a: b: a // b) { } sets);
          at = name: strongest (concatMap (set: if set ? ${name} then [ set.${name} ] else [ ]) sets);
        in
        listToAttrs (
          concatMap (
            name:
            if at name == [ ] then
              [ ]
            else
              [
                {
                  inherit name;
                  value = merged "${where}.${name}" type (at name);
                }
              ]
          ) names
        );
    };
    nullOr = type: {
      name = "null or ${type.name}";
      check = v: v == null || type.check v;
      merge = where: values: if any (v: v == null) values then one where values else type.merge where values;
    };
    either = a: b: {
      name = "${a.name} or ${b.name}";
      check = v: a.check v || b.check v;
      merge = where: values: if all a.check values then a.merge where values else b.merge where values;
    };
  };

  # --- modules ---

  isOption = node: isAttrs node && node._type or "" == "option";

  load =
    arguments: module:
    let
      value = if isFunction module || isAttrs module then module else import module;
      body = if isFunction value then value arguments else value;
      options = body.options or { };
      config =
        if body ? config || body ? options then body.config or { } else removeAttrs body [ "imports" ];
    in
    concatMap (load arguments) (body.imports or [ ]) ++ [ { inherit options config; } ];

  mergeOptions =
    a: b:
    a
    // mapAttrs (
      name: node: if a ? ${name} && !isOption node then mergeOptions a.${name} node else node
    ) b;

  # The values at one node of the tree of options; what is no option is merged as it comes.
  valuesOf =
    where: node: definitions:
    let
      sets = concatMap pushDown definitions;
      at = name: concatMap (set: if set ? ${name} then [ set.${name} ] else [ ]) sets;
      value =
        name: option:
        let
          default = if option ? default then [ (mkOverride 1500 option.default) ] else [ ];
        in
        if isOption option then
          merged "${where}${name}" option.type (strongest (at name ++ default))
        else
          valuesOf "${where}${name}." option (at name);
    in
    (types.attrsOf types.anything).merge where (map (set: removeAttrs set (attrNames node)) sets)
    // mapAttrs value node;

  evalModules =
    {
      modules,
      specialArgs ? { },
    }:
    let
      arguments = {
        inherit config lib options;
      }
      // specialArgs;
      loaded = concatMap (load arguments) modules;
      options = foldl' mergeOptions { } (map (m: m.options) loaded);
      config = valuesOf "" options (map (m: m.config) loaded);
    in
    {
      inherit config options;
    };

  # --- the rest ---

  lib = {
    inherit
      concatMap
      evalModules
      isOption
      mkIf
      mkMerge
      mkOrder
      types
      ;
    mkDefault = mkOverride 1000;
    mkForce = mkOverride 50;
    mkBefore = mkOrder 500;
    mkAfter = mkOrder 1500;
    mkOption = attributes: attributes // { _type = "option"; };
    literalExpression = text: {
      _type = "literalExpression";
      inherit text;
    };
    concatMapStrings = f: list: concatStringsSep "" (map f list);
    escapeShellArg =
      word:
      if match "[[:alnum:],._+:@%/-]+" (toString word) != null then
        toString word
      else
        "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] (toString word)}'";
    escapeShellArgs = words: concatStringsSep " " (map lib.escapeShellArg words);
    hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
    removePrefix =
      prefix: text:
      if lib.hasPrefix prefix text then substring (stringLength prefix) (stringLength text) text else text;
    makeBinPath = packages: concatStringsSep ":" (map (p: "${p}/bin") packages);
    mapAttrs' = f: set: listToAttrs (attrValues (mapAttrs f set));
    optional = condition: value: if condition then [ value ] else [ ];
    optionalAttrs = condition: set: if condition then set else { };
    optionals = condition: list: if condition then list else [ ];
    toList = value: if isList value then value else [ value ];
    versionAtLeast = a: b: builtins.compareVersions a b >= 0;
  };
in
lib
