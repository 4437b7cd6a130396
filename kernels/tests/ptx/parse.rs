//! Reads a module: variables, functions, registers and labels. Instructions are handed to `decode`.

use super::decode::decode;
use super::fault::Error;
use super::instruction::{
    Function, GlobalVariable, Instruction, Op, Parameter, Preset, Reg, Register, SharedVariable, Space, Special, Type,
};
use super::lex::{Token, tokens};
use std::collections::HashMap;

type Result<T, E = Error> = std::result::Result<T, E>;

/// All that a text declares.
#[derive(Clone, Debug, Default)]
pub(super) struct Parsed {
    pub(super) functions: Vec<Function>,
    pub(super) shared: Vec<SharedVariable>,
    pub(super) globals: Vec<GlobalVariable>,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entity {
    Register(Reg),
    Shared(usize),
    Global(usize),
    /// An offset into the arguments of a kernel.
    Argument(usize),
    /// A variable or a parameter in the frame of the function: offset and size.
    Frame(usize, usize),
    Function(usize),
    /// What a failed assertion calls.
    Trap,
}

/// An operand as it is written.
#[derive(Clone, Debug)]
pub(super) enum Operand<'a> {
    Name { name: &'a str, negated: bool },
    Literal { text: &'a str, negative: bool },
    Vector(Vec<Operand<'a>>),
    Address { base: Box<Operand<'a>>, offset: i64 },
    Pair(&'a str, &'a str),
    Group(Vec<Operand<'a>>),
}

/// The names of a block.
#[derive(Clone, Default)]
struct Scope<'a> {
    names: HashMap<&'a str, Entity>,
    /// Of `%r<3>`, which declares `%r0`, `%r1` and `%r2`: the prefix, the first register and how many.
    numbered: Vec<(&'a str, Reg, usize)>,
}

impl Scope<'_> {
    fn find(&self, name: &str) -> Option<Entity> {
        let numbered = || {
            let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
            let number: usize = name[prefix.len()..].parse().ok()?;
            let mut ranges = self.numbered.iter().filter(|(of, _, count)| *of == prefix && number < *count);
            ranges.next().map(|(_, first, _)| Entity::Register(first + number as Reg))
        };
        self.names.get(name).copied().or_else(numbered)
    }
}

/// The function that is being read.
pub(super) struct Body<'a> {
    pub(super) function: Function,
    /// Names of the module, then of each open block.
    scopes: Vec<Scope<'a>>,
    presets: HashMap<Preset, Reg>,
    labels: HashMap<&'a str, usize>,
    tables: HashMap<&'a str, Vec<&'a str>>,
    /// Branches whose targets are found when the whole function has been read.
    branches: Vec<(usize, &'a str)>,
}

impl<'a> Body<'a> {
    pub(super) fn find(&self, name: &str) -> Option<Entity> {
        self.scopes.iter().rev().find_map(|scope| scope.find(name))
    }

    fn declare(&mut self, name: &'a str, entity: Entity) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.names.insert(name, entity);
        }
    }

    fn register(&mut self, name: String, bits: u32, preset: Option<Preset>) -> Reg {
        self.function.registers.push(Register { name, bits, preset });
        (self.function.registers.len() - 1) as Reg
    }

    fn declare_numbered(&mut self, prefix: &'a str, ty: Type, count: usize) {
        let first = self.function.registers.len() as Reg;
        for number in 0..count {
            self.register(format!("{prefix}{number}"), ty.bits(), None);
        }
        if let Some(scope) = self.scopes.last_mut() {
            scope.numbered.push((prefix, first, count));
        }
    }

    /// A register that holds this when the function starts.
    pub(super) fn preset(&mut self, preset: Preset, name: &str) -> Reg {
        if let Some(register) = self.presets.get(&preset) {
            return *register;
        }
        let register = self.register(name.to_owned(), 64, Some(preset));
        self.presets.insert(preset, register);
        register
    }

    /// A register that nobody reads, for results that are thrown away.
    pub(super) fn sink(&mut self) -> Reg {
        self.register("_".to_owned(), 64, None)
    }

    /// Notes that the instruction decoded next branches to a label or by a table of them.
    pub(super) fn branch(&mut self, label: &'a str) {
        self.branches.push((self.function.code.len(), label));
    }

    /// Room for a variable in the frame.
    fn frame(&mut self, align: usize, bytes: usize) -> usize {
        let offset = self.function.frame_bytes.next_multiple_of(align);
        self.function.frame_bytes = offset + bytes;
        offset
    }
}

/// A variable as it is declared.
struct Variable<'a> {
    name: &'a str,
    ty: Type,
    align: usize,
    /// `None` for `[]`.
    bytes: Option<usize>,
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
    parsed: Parsed,
    names: HashMap<&'a str, Entity>,
    end: u32,
}

pub(super) fn parse(text: &str) -> Result<Parsed> {
    let end = text.lines().count() as u32;
    let mut parser = Parser { tokens: tokens(text)?, at: 0, parsed: Parsed::default(), names: HashMap::new(), end };
    while parser.at < parser.tokens.len() {
        parser.declaration()?;
    }
    parser.check_calls()?;
    Ok(parser.parsed)
}

impl<'a> Parser<'a> {
    // ---- Tokens

    fn peek(&self) -> &'a str {
        self.tokens.get(self.at).map_or("", |token| token.text)
    }

    fn line(&self) -> u32 {
        self.tokens.get(self.at).map_or(self.end, |token| token.line)
    }

    fn next(&mut self) -> &'a str {
        let text = self.peek();
        self.at += 1;
        text
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::parse(self.line(), self.peek(), message))
    }

    fn accept(&mut self, text: &str) -> bool {
        let found = self.peek() == text;
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, text: &str) -> Result<()> {
        if self.accept(text) { Ok(()) } else { self.error(format!("expected `{text}`")) }
    }

    fn word(&mut self) -> Result<&'a str> {
        match self.peek().starts_with(|c: char| c.is_ascii_alphanumeric() || "_$%.".contains(c)) {
            true => Ok(self.next()),
            false => self.error("expected a name"),
        }
    }

    fn size(&mut self) -> Result<usize> {
        match integer(self.peek()).and_then(|value| usize::try_from(value).ok()) {
            Some(value) => {
                self.at += 1;
                Ok(value)
            }
            None => self.error("expected a whole number"),
        }
    }

    fn skip_line(&mut self) {
        let line = self.line();
        while self.at < self.tokens.len() && self.line() == line {
            self.at += 1;
        }
    }

    fn skip_past(&mut self, text: &str) {
        while self.at < self.tokens.len() && self.next() != text {}
    }

    // ---- Declarations of the module

    fn declaration(&mut self) -> Result<()> {
        match self.peek() {
            ".version" | ".target" | ".address_size" | ".file" | ".loc" => self.skip_line(),
            ".section" => self.skip_past("}"),
            ".pragma" => self.skip_past(";"),
            ".visible" | ".extern" | ".weak" | ".common" => self.at += 1,
            ".entry" | ".func" => return self.function(),
            ".global" | ".const" => return self.global(),
            ".shared" => {
                for variable in self.variables()? {
                    let entity = self.shared(None, &variable);
                    self.names.insert(variable.name, entity);
                }
            }
            _ => return self.error("not a declaration that is known here"),
        }
        Ok(())
    }

    fn shared(&mut self, owner: Option<usize>, variable: &Variable<'a>) -> Entity {
        self.parsed.shared.push(SharedVariable { owner, align: variable.align, bytes: variable.bytes });
        Entity::Shared(self.parsed.shared.len() - 1)
    }

    fn global(&mut self) -> Result<()> {
        let constant = self.next() == ".const";
        let variable = self.variable_head()?;
        let mut bytes = Vec::new();
        if self.accept("=") {
            self.initialiser(variable.ty, &mut bytes)?;
        }
        let Some(size) = variable.bytes else { return self.error("a variable without a size") };
        if bytes.len() > size {
            return self.error("more initial values than the variable has room for");
        }
        bytes.resize(size, 0);
        self.expect(";")?;
        self.parsed.globals.push(GlobalVariable { bytes, constant });
        self.names.insert(variable.name, Entity::Global(self.parsed.globals.len() - 1));
        Ok(())
    }

    fn initialiser(&mut self, ty: Type, bytes: &mut Vec<u8>) -> Result<()> {
        if self.accept("{") {
            while !self.accept("}") {
                self.initialiser(ty, bytes)?;
                self.accept(",");
            }
            return Ok(());
        }
        let negative = self.accept("-");
        match literal(self.peek(), negative, ty) {
            Ok(value) => {
                self.at += 1;
                bytes.extend_from_slice(&value.to_le_bytes()[..ty.bytes()]);
                Ok(())
            }
            Err(message) => self.error(message),
        }
    }

    /// One or more variables after their state space, up to the semicolon.
    fn variables(&mut self) -> Result<Vec<Variable<'a>>> {
        self.at += 1;
        let variable = self.variable_head()?;
        let (ty, align) = (variable.ty, variable.align);
        let mut variables = vec![variable];
        while self.accept(",") {
            variables.push(self.variable_name(ty, align)?);
        }
        self.expect(";")?;
        Ok(variables)
    }

    fn variable_head(&mut self) -> Result<Variable<'a>> {
        let mut align = None;
        loop {
            match self.peek() {
                ".align" => {
                    self.at += 1;
                    align = Some(self.size()?.max(1));
                }
                ".attribute" => self.skip_past(")"),
                _ => break,
            }
        }
        let ty = self.ty()?;
        self.variable_name(ty, align.unwrap_or(ty.bytes()))
    }

    fn variable_name(&mut self, ty: Type, align: usize) -> Result<Variable<'a>> {
        let name = self.word()?;
        let mut bytes = Some(ty.bytes());
        while self.accept("[") {
            if self.accept("]") {
                bytes = None;
                break;
            }
            let len = self.size()?;
            bytes = bytes.map(|bytes| bytes * len);
            self.expect("]")?;
        }
        Ok(Variable { name, ty, align, bytes })
    }

    fn ty(&mut self) -> Result<Type> {
        match self.peek().strip_prefix('.').and_then(Type::named) {
            Some(ty) => {
                self.at += 1;
                Ok(ty)
            }
            None => self.error("expected a type"),
        }
    }

    // ---- Functions

    fn function(&mut self) -> Result<()> {
        let entry = self.next() == ".entry";
        let mut body = Body {
            function: Function { entry, ..Function::default() },
            scopes: vec![Scope::default()],
            presets: HashMap::new(),
            labels: HashMap::new(),
            tables: HashMap::new(),
            branches: Vec::new(),
        };
        if self.peek() == "(" {
            body.function.results = self.parameters(&mut body, entry)?;
        }
        let name = self.word()?;
        body.function.name = name.to_owned();
        if self.peek() == "(" {
            body.function.parameters = self.parameters(&mut body, entry)?;
        }
        self.attributes(&mut body.function)?;
        let index = self.declare_function(name, &body.function);
        if self.accept(";") {
            return Ok(());
        }
        body.function.defined = true;
        body.scopes.insert(0, Scope { names: self.names.clone(), ..Scope::default() });
        self.expect("{")?;
        self.block(&mut body, index)?;
        self.resolve_branches(&mut body)?;
        self.parsed.functions[index] = body.function;
        Ok(())
    }

    /// The number of a function, which may be declared before it is defined.
    fn declare_function(&mut self, name: &'a str, function: &Function) -> usize {
        if let Some(Entity::Function(index)) = self.names.get(name) {
            return *index;
        }
        let assertion = name == "__assertfail";
        let index = self.parsed.functions.len();
        self.names.insert(name, if assertion { Entity::Trap } else { Entity::Function(index) });
        self.parsed.functions.push(function.clone());
        index
    }

    /// Every function that is called must have been defined by the end of the text.
    fn check_calls(&self) -> Result<()> {
        for instruction in self.parsed.functions.iter().flat_map(|function| &function.code) {
            if let Op::Call(call) = &instruction.op {
                let function = &self.parsed.functions[call.function];
                if !function.defined {
                    return Err(Error::parse(
                        instruction.line,
                        &function.name,
                        "the function that is called has no body",
                    ));
                }
            }
        }
        Ok(())
    }

    fn parameters(&mut self, body: &mut Body<'a>, entry: bool) -> Result<Vec<Parameter>> {
        self.expect("(")?;
        let mut parameters = Vec::new();
        while !self.accept(")") {
            self.expect(".param")?;
            let variable = self.parameter()?;
            let bytes = variable.bytes.unwrap_or(0);
            let offset = if entry {
                let offset = body.function.parameter_bytes.next_multiple_of(variable.align);
                body.function.parameter_bytes = offset + bytes;
                body.declare(variable.name, Entity::Argument(offset));
                offset
            } else {
                let offset = body.frame(variable.align, bytes);
                body.declare(variable.name, Entity::Frame(offset, bytes));
                offset
            };
            parameters.push(Parameter { offset, bytes });
            self.accept(",");
        }
        Ok(parameters)
    }

    /// A parameter may say of a pointer where it points and how it is aligned: `.u64 .ptr .global .align 4 name`.
    fn parameter(&mut self) -> Result<Variable<'a>> {
        if self.tokens.get(self.at + 1).is_none_or(|token| token.text != ".ptr") {
            return self.variable_head();
        }
        let ty = self.ty()?;
        while self.peek().starts_with('.') {
            if self.next() == ".align" {
                self.size()?;
            }
        }
        self.variable_name(ty, ty.bytes())
    }

    fn attributes(&mut self, function: &mut Function) -> Result<()> {
        loop {
            match self.peek() {
                ".maxntid" | ".reqntid" => {
                    self.at += 1;
                    let mut threads = self.size()? as u64;
                    while self.accept(",") {
                        threads *= self.size()? as u64;
                    }
                    function.most_threads = Some(threads);
                }
                ".minnctapersm" | ".maxnreg" | ".maxnctapersm" => {
                    self.at += 1;
                    self.size()?;
                }
                ".noreturn" => self.at += 1,
                ".pragma" => self.skip_past(";"),
                _ => return Ok(()),
            }
        }
    }

    fn block(&mut self, body: &mut Body<'a>, index: usize) -> Result<()> {
        body.scopes.push(Scope::default());
        while !self.accept("}") {
            if self.at >= self.tokens.len() {
                return self.error("the function has no end");
            }
            self.statement(body, index)?;
        }
        body.scopes.pop();
        Ok(())
    }

    fn statement(&mut self, body: &mut Body<'a>, index: usize) -> Result<()> {
        match self.peek() {
            "{" => {
                self.at += 1;
                return self.block(body, index);
            }
            ";" => self.at += 1,
            ".loc" | ".file" => self.skip_line(),
            ".pragma" => self.skip_past(";"),
            ".reg" => return self.registers(body),
            ".shared" => {
                for variable in self.variables()? {
                    let entity = self.shared(Some(index), &variable);
                    body.declare(variable.name, entity);
                }
            }
            ".local" | ".param" => {
                for variable in self.variables()? {
                    let bytes = variable.bytes.unwrap_or(0);
                    let offset = body.frame(variable.align, bytes);
                    body.declare(variable.name, Entity::Frame(offset, bytes));
                }
            }
            _ if self.tokens.get(self.at + 1).is_some_and(|token| token.text == ":") => return self.label(body),
            _ => return self.instruction(body),
        }
        Ok(())
    }

    fn label(&mut self, body: &mut Body<'a>) -> Result<()> {
        let name = self.word()?;
        self.expect(":")?;
        if self.accept(".branchtargets") {
            let mut targets = vec![self.word()?];
            while self.accept(",") {
                targets.push(self.word()?);
            }
            body.tables.insert(name, targets);
            return self.expect(";");
        }
        match body.labels.insert(name, body.function.code.len()) {
            None => Ok(()),
            Some(_) => self.error(format!("a second label `{name}`")),
        }
    }

    fn registers(&mut self, body: &mut Body<'a>) -> Result<()> {
        self.at += 1;
        let ty = self.ty()?;
        loop {
            let name = self.word()?;
            if self.accept("<") {
                let count = self.size()?;
                self.expect(">")?;
                body.declare_numbered(name, ty, count);
            } else {
                let register = body.register(name.to_owned(), ty.bits(), None);
                body.declare(name, Entity::Register(register));
            }
            if !self.accept(",") {
                return self.expect(";");
            }
        }
    }

    fn instruction(&mut self, body: &mut Body<'a>) -> Result<()> {
        let guard = if self.accept("@") { Some(self.guard(body)?) } else { None };
        let line = self.line();
        let opcode = self.word()?;
        let mut operands = Vec::new();
        while self.peek() != ";" {
            operands.push(self.operand()?);
            if !self.accept(",") && self.peek() != ";" {
                return self.error("expected `,` or `;`");
            }
        }
        self.expect(";")?;
        let op =
            decode(body, &self.parsed, opcode, &operands).map_err(|message| Error::parse(line, opcode, message))?;
        body.function.code.push(Instruction { line, guard, op });
        Ok(())
    }

    fn guard(&mut self, body: &Body<'a>) -> Result<(Reg, bool)> {
        let negated = self.accept("!");
        match body.find(self.peek()) {
            Some(Entity::Register(register)) if body.function.registers[register as usize].bits == 1 => {
                self.at += 1;
                Ok((register, negated))
            }
            _ => self.error("expected a predicate"),
        }
    }

    fn operand(&mut self) -> Result<Operand<'a>> {
        match self.peek() {
            "{" => Ok(Operand::Vector(self.list("{", "}")?)),
            "(" => Ok(Operand::Group(self.list("(", ")")?)),
            "[" => self.address(),
            "-" => {
                self.at += 1;
                Ok(Operand::Literal { text: self.word()?, negative: true })
            }
            "!" => {
                self.at += 1;
                Ok(Operand::Name { name: self.word()?, negated: true })
            }
            text if text.starts_with(|c: char| c.is_ascii_digit()) => {
                self.at += 1;
                Ok(Operand::Literal { text, negative: false })
            }
            _ => {
                let name = self.word()?;
                if self.accept("|") {
                    return Ok(Operand::Pair(name, self.word()?));
                }
                Ok(Operand::Name { name, negated: false })
            }
        }
    }

    fn list(&mut self, open: &str, close: &str) -> Result<Vec<Operand<'a>>> {
        self.expect(open)?;
        let mut operands = Vec::new();
        while !self.accept(close) {
            operands.push(self.operand()?);
            if !self.accept(",") && self.peek() != close {
                return self.error(format!("expected `,` or `{close}`"));
            }
        }
        Ok(operands)
    }

    fn address(&mut self) -> Result<Operand<'a>> {
        self.expect("[")?;
        let base = Box::new(self.operand()?);
        let mut offset = 0;
        while matches!(self.peek(), "+" | "-") {
            // NVRTC writes `+-4`.
            let negative = (self.next() == "-") ^ self.accept("-");
            let size = self.size()? as i64;
            offset += if negative { -size } else { size };
        }
        self.expect("]")?;
        Ok(Operand::Address { base, offset })
    }

    fn resolve_branches(&self, body: &mut Body<'a>) -> Result<()> {
        for (at, label) in std::mem::take(&mut body.branches) {
            let instruction = &mut body.function.code[at];
            let find = |label: &str| {
                let target = body.labels.get(label).copied();
                target.ok_or_else(|| Error::parse(instruction.line, label, "no such label in this function"))
            };
            match &mut instruction.op {
                Op::Branch { target } => *target = find(label)?,
                Op::BranchIndexed { targets, .. } => {
                    let names = body.tables.get(label);
                    let none = || Error::parse(instruction.line, label, "no such table of labels");
                    *targets = names.ok_or_else(none)?.iter().map(|name| find(name)).collect::<Result<_>>()?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A whole number as PTX writes it.
pub(super) fn integer(text: &str) -> Option<u64> {
    let text = text.trim_end_matches('U');
    let lower = text.to_ascii_lowercase();
    match lower.as_bytes() {
        [b'0', b'x', ..] => u64::from_str_radix(&lower[2..], 16).ok(),
        [b'0', b'b', ..] => u64::from_str_radix(&lower[2..], 2).ok(),
        [b'0', _, ..] => u64::from_str_radix(&lower[1..], 8).ok(),
        _ => lower.parse().ok(),
    }
}

/// The bits of a literal of this type.
pub(super) fn literal(text: &str, negative: bool, ty: Type) -> Result<u64, String> {
    let unknown = || format!("`{text}` is no literal of type {ty:?}");
    let lower = text.to_ascii_lowercase();
    let hexadecimal = |digits: &str| u64::from_str_radix(digits, 16).map_err(|_| unknown());
    let float = match lower.as_bytes() {
        [b'0', b'f', ..] => Some(f64::from(f32::from_bits(hexadecimal(&lower[2..])? as u32))),
        [b'0', b'd', ..] => Some(f64::from_bits(hexadecimal(&lower[2..])?)),
        _ if ty.float() && lower.contains('.') => Some(lower.parse().map_err(|_| unknown())?),
        _ => None,
    };
    match (float, ty) {
        (Some(value), _) => {
            let value = if negative { -value } else { value };
            match ty.bits() {
                // The bits themselves, so that a NaN keeps its own.
                32 if lower.starts_with("0f") && !negative => hexadecimal(&lower[2..]),
                64 if lower.starts_with("0d") && !negative => hexadecimal(&lower[2..]),
                32 => Ok(u64::from((value as f32).to_bits())),
                64 => Ok(value.to_bits()),
                _ => Err(unknown()),
            }
        }
        (None, Type::F32 | Type::F64) => Err(unknown()),
        (None, _) => {
            let value = integer(text).ok_or_else(unknown)?;
            let value = if negative { value.wrapping_neg() } else { value };
            Ok(value & super::arithmetic::mask(ty.bits()))
        }
    }
}

/// The special register of this name.
pub(super) fn special(name: &str) -> Option<Special> {
    let axis = match name.rsplit_once('.') {
        Some((_, "x")) => 0,
        Some((_, "y")) => 1,
        Some((_, "z")) => 2,
        _ => 3,
    };
    let lanes = |below, own, above| Some(Special::LaneMask { below, own, above });
    match name.split('.').next().unwrap_or(name) {
        "%tid" if axis < 3 => Some(Special::Thread(axis)),
        "%ntid" if axis < 3 => Some(Special::Threads(axis)),
        "%ctaid" if axis < 3 => Some(Special::Block(axis)),
        "%nctaid" if axis < 3 => Some(Special::Blocks(axis)),
        "%laneid" => Some(Special::Lane),
        "%warpid" => Some(Special::Warp),
        "%nwarpid" => Some(Special::Warps),
        "WARP_SZ" => Some(Special::WarpSize),
        "%lanemask_eq" => lanes(false, true, false),
        "%lanemask_lt" => lanes(true, false, false),
        "%lanemask_le" => lanes(true, true, false),
        "%lanemask_gt" => lanes(false, false, true),
        "%lanemask_ge" => lanes(false, true, true),
        "%dynamic_smem_size" => Some(Special::DynamicShared),
        _ => None,
    }
}

/// The space that a modifier names.
pub(super) fn space(name: &str) -> Option<Space> {
    match name {
        "global" => Some(Space::Global),
        "shared" | "shared::cta" => Some(Space::Shared),
        "local" => Some(Space::Local),
        "const" => Some(Space::Const),
        "param" => Some(Space::Param),
        _ => None,
    }
}
